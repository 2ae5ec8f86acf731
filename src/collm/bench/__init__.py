"""`collm bench`: what writing together costs, beside what it could cost at best."""
