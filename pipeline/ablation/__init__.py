"""The paper's tables and figures, as variants of one Config."""
