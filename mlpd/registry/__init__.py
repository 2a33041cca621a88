"""Model registry engine: versions, aliases and lineage over an OCI image layout."""
