"""A folder to copy to a phone: the quantized model for Optimum and for ONNX Runtime GenAI, with a manifest."""

from optimum_comp.bundle.assembly import write_bundle
from optimum_comp.bundle.verification import MANIFEST, BundleError, BundleReport, verify_bundle


__all__ = ["MANIFEST", "BundleError", "BundleReport", "verify_bundle", "write_bundle"]
