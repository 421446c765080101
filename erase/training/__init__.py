"""The saliency pass, masked fine-tuning, closed forms, and the memory that they need."""
