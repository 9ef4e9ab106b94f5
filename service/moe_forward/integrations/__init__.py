"""Libraries that use the service through its client: one package a library, which that library's users import."""
