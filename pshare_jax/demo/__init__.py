"""`make demo`: a multi-agent session over one shared prefill, and what it costs without sharing."""
