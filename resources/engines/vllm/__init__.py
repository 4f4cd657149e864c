"""vLLM in a worker process of its own. From outside, import `sampler`; the rest runs in its worker process."""
