"""What `clevrcast doctor` looks at, one module for each kind of thing; `checks` says how it looks."""
