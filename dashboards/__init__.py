"""Pages that read the artifact store, never a stage."""
