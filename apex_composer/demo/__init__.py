"""The job of `make train`, from raw text to an APEX model beside its vanilla twin. Imports all."""
