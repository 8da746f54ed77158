"""The artifact explorer. It reads the store through `infra` and never imports a stage."""
