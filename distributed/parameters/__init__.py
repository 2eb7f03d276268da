"""Parameters as views of flat buckets, which their owners' new values are gathered into while the next pass runs."""
