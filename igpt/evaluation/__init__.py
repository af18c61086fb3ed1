"""What a trained model is good for: features of every layer and linear probes."""
