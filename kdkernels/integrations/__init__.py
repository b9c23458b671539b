"""Drop-ins for other trainers, one module each; nothing here is imported by the core."""
