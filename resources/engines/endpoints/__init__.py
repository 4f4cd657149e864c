"""vLLM servers that somebody else has started. From outside, import `sampler`; the rest runs in its worker process."""
