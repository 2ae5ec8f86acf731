"""Everything that answers a `Query`: transformers models, tools, fakes; and how they are loaded and saved."""
