"""Adapters to other tools' interfaces, each in a module of its own."""
