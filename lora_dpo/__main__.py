"""`python -m lora_dpo` is `lora-dpo`."""

from lora_dpo.cli import main

if __name__ == "__main__":
    main()
