"""Calling LLM judges: engine, window, retries, rate limits, budget, Batch API, ledger.

Public modules: `ask`, `client`, `ledger`, `batch`, `errors`.
"""
