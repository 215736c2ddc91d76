"""Shapes on the wire. `*In` is what a caller sends, `*Out` what it gets; OpenAI's resources keep OpenAI's shapes."""
