"""The toy world, whose every truth can be computed: its videos, its codec, its metrics and its own stage 0."""
