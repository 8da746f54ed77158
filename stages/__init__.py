"""One file a stage: a frozen config and a plain function, artifacts in, one artifact out."""
