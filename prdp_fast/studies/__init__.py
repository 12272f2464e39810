"""Studies: one question, several recipes that differ in it alone, over several seeds; run, compared and written down."""
