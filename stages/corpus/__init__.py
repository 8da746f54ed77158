"""Documents: sources that read them, rules and signatures that decide which are worth a token."""
