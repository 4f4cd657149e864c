"""Objectives: one module each, one line each here."""
