"""The browser's side of lora-dpo, on this machine only: base and adapted pictures side by side."""
