"""Data on its way to training: sources, image shards, latent shards, and the seeded stream over shards."""
