"""What knows nothing of FlashMotion: options, processes, runs, optimizers, weight files, pictures and videos."""
