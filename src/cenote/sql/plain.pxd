cimport cython

@cython.locals(p="const unsigned char*", n=Py_ssize_t, i=Py_ssize_t, c="unsigned char", first="unsigned char",
               word="const unsigned char*", allowed="const unsigned char*")
cpdef bint plain(bytes data, Py_ssize_t start, Py_ssize_t end)
cdef bint _transaction(bytes text)
cdef bint _blank(const unsigned char* p, Py_ssize_t i, Py_ssize_t n)
cdef bint _into(const unsigned char* p, Py_ssize_t i, Py_ssize_t n)
