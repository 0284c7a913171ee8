"""Wan2.2's VAE and text encoder, which together are the codec of preset wan5b."""
