"""llama.cpp's own server, from the wheel `xllamacpp`: python llama_cpp_server.py GGUF PORT [requests at a time]"""

import signal
import sys

import xllamacpp

if __name__ == "__main__":
    parameters = xllamacpp.CommonParams()
    parameters.model.path = sys.argv[1]
    parameters.hostnames, parameters.port = ["127.0.0.1"], int(sys.argv[2])
    parameters.n_parallel = int(sys.argv[3]) if len(sys.argv) > 3 else 1
    parameters.n_ctx = 1024 * parameters.n_parallel  # which they share
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(parameters)
    print("at", server.listening_address, flush=True)
    signal.pause()
