cimport cython

@cython.locals(p="const unsigned char*", n=Py_ssize_t, i=Py_ssize_t, c="unsigned char", first="unsigned char",
               word="const unsigned char*", allowed="const unsigned char*")
cpdef bint plain(bytes data, Py_ssize_t start, Py_ssize_t end)
cdef bint _transaction(bytes text)
@cython.locals(a="unsigned char", b="unsigned char", c="unsigned char")
cdef bint _of_the_server(const unsigned char* p, Py_ssize_t i, Py_ssize_t n)
cdef bint _blank(const unsigned char* p, Py_ssize_t i, Py_ssize_t n)
cdef bint _into(const unsigned char* p, Py_ssize_t i, Py_ssize_t n)
