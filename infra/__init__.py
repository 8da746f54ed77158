"""Artifact store, stage decorator, Ray session, metrics, provenance. Imports nothing else of Fathom."""
