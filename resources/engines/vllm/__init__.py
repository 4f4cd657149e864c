"""vLLM in its own worker process. From outside, import `sampler`; the rest runs in its worker process."""
