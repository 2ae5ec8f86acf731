"""Who wrote which token: in the terminal, as HTML, as a trace file; plots."""
