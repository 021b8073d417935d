"""Numbers with intervals: win rates, effect sizes and implicit preference on held-out data."""
