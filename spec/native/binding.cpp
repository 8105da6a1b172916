// Python face of the native drafters. Arrays are read in place and calls run without the GIL.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>

#include "suffix_automaton.h"

namespace py = pybind11;
using paceline::SuffixAutomaton;
using paceline::Token;
using paceline::TokenView;

namespace {

using TokenArray = py::array_t<Token, py::array::c_style>;

TokenView view(const TokenArray& tokens) {
  if (tokens.ndim() != 1) {
    throw std::invalid_argument("tokens must be one-dimensional, got " +
                                std::to_string(tokens.ndim()) + " dimensions");
  }
  return {tokens.data(), static_cast<std::size_t>(tokens.size())};
}

}  // namespace

PYBIND11_MODULE(_native, module) {
  module.doc() = "Native drafters of paceline.spec.";
  using NoGil = py::call_guard<py::gil_scoped_release>;

  py::class_<SuffixAutomaton>(module, "SuffixAutomaton")
      .def(py::init<>())
      .def(
          "extend",
          [](SuffixAutomaton& self, const TokenArray& tokens) { self.extend(view(tokens)); },
          py::arg("tokens").noconvert(), NoGil())
      .def("end_sequence", &SuffixAutomaton::end_sequence, NoGil())
      .def(
          "longest_match",
          [](const SuffixAutomaton& self, const TokenArray& context) {
            return self.longest_match(view(context));
          },
          py::arg("context").noconvert(), NoGil())
      .def(
          "propose",
          [](const SuffixAutomaton& self, const TokenArray& context, std::size_t max_tokens) {
            return self.propose(view(context), max_tokens);
          },
          py::arg("context").noconvert(), py::arg("max_tokens"), NoGil())
      .def_property_readonly("num_tokens", py::cpp_function(&SuffixAutomaton::num_tokens, NoGil()))
      .def_property_readonly("num_states", py::cpp_function(&SuffixAutomaton::num_states, NoGil()))
      .def_property_readonly("memory_bytes", py::cpp_function(&SuffixAutomaton::memory_bytes, NoGil()));
}
