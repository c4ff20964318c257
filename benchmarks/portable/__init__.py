"""One file, every processor: what the files that ship compute on machines that are not here."""
