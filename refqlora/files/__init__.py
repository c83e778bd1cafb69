"""Files in and out: Hugging Face's models, PEFT's adapters, bitsandbytes' 4-bit weights, and the hub."""
