"""What the documentation site is made with beside mkdocs: pages whose examples run."""
