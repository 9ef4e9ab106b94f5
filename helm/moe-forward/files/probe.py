"""Ask a health route with the pod's own certificate: the kubelet has none to show."""

import ssl
import sys
import urllib.request

url, folder = sys.argv[1:]
# The address is the pod's own and in no certificate; what counts is that the server has this very one.
context = ssl.create_default_context(cafile=f"{folder}/tls.crt")
context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
context.check_hostname = False
context.load_cert_chain(f"{folder}/tls.crt", f"{folder}/tls.key")
urllib.request.urlopen(url, timeout=4, context=context)
