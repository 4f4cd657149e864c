"""vLLM servers that are already running. From outside, import `sampler`; the rest runs in its worker process."""
