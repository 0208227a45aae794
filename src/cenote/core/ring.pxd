cdef class Node:
    cdef public Ring ring
    cdef public Node before
    cdef public Node after

cdef class Ring:
    cdef public str name
    cdef public Py_ssize_t size
    cdef public Node first
    cdef public Node last

    cpdef append(self, Node node)
    cpdef appendleft(self, Node node)
    cpdef insert_after(self, Node node, Node older)
    cpdef remove(self, Node node)
