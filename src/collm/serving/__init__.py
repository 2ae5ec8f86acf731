"""A system behind HTTP: the OpenAI API for the clients people have, and a page to try it on."""
