"""Wan2.2: its VAE, its text encoder, and both as the codec of preset wan5b."""
