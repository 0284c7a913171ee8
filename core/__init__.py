"""Everything that knows nothing of FlashMotion: options, processes, runs, optimizers, weight files, images, videos."""
