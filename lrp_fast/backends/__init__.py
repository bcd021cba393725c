"""Backends: who executes a plan's layers. ``torch`` runs everywhere; more are added beside it."""
