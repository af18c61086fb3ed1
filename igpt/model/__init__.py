"""Image GPT: its configuration, the model, and the Hugging Face format."""
