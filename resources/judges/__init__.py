"""What asks an LLM: engine, window, retry, rate, budget, Batch API, ledger.

From outside: `ask`, `client`, `ledger`, `batch`, `errors`.
"""
