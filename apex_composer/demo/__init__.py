"""The job of `make train`: from raw text to an APEX-trained model beside its vanilla twin."""
