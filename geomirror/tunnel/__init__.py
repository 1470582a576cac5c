"""The encrypted overlay: identity, membership, enrolment, mutual TLS links."""
