"""What decides an answer: found in models and formatters (`finding`), and compared (`comparing`)."""
