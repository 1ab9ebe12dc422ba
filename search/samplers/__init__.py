"""Who proposes, one sampler a file."""
