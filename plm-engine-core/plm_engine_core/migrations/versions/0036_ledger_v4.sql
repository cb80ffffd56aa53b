-- The rows of the ledger, by a function that plm-shared renders (`quick_ledger_function` of its emitter, the only module
-- that knows how the ledger is written); a test holds the two equal.
CREATE FUNCTION engine_write_ledger_v4(p_tenant uuid, p_ledger jsonb) RETURNS void
LANGUAGE plpgsql VOLATILE SECURITY INVOKER SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    v_time  text := overlay(lpad(to_hex((extract(epoch FROM now()) * 1000)::bigint), 12, '0') PLACING '-' FROM 9 FOR 0) || '-7';
    v_rest  jsonb := p_ledger;
    v_row   jsonb;
BEGIN
    IF jsonb_array_length(p_ledger -> 'telemetry_events') = 1 THEN
        v_row := p_ledger #> '{telemetry_events,0}';
        INSERT INTO telemetry_events (id, tenant_id, trace_id, span_id, event_type, capability, payload, idempotency_key) VALUES ((v_time || overlay(left(encode(sha256(convert_to(v_row ->> 'idempotency_key', 'UTF8')), 'hex'), 18) PLACING '8' FROM 4 FOR 0))::uuid, p_tenant, v_row ->> 'trace_id', v_row ->> 'span_id', v_row ->> 'event_type', v_row ->> 'capability', v_row -> 'payload', v_row ->> 'idempotency_key') ON CONFLICT DO NOTHING;
        IF FOUND THEN
            v_rest := v_rest - 'telemetry_events';
        END IF;
    END IF;
    IF jsonb_array_length(p_ledger -> 'llm_calls') = 1 THEN
        v_row := p_ledger #> '{llm_calls,0}';
        INSERT INTO llm_calls (id, tenant_id, span_id, model, prompt_tokens, completion_tokens, run_id, cost_eur, cost_status, pricing_version, idempotency_key, pricing_snapshot_id) SELECT (v_time || overlay(left(encode(sha256(convert_to(v_row ->> 'idempotency_key', 'UTF8')), 'hex'), 18) PLACING '8' FROM 4 FOR 0))::uuid, p_tenant, v_row ->> 'span_id', v_row ->> 'model', (v_row ->> 'prompt_tokens')::integer, (v_row ->> 'completion_tokens')::integer, (v_row ->> 'run_id')::uuid, (v_row ->> 'cost_eur')::numeric, (v_row ->> 'cost_status')::cost_status, v_row ->> 'pricing_version', v_row ->> 'idempotency_key', CASE WHEN s.pricing_version = v_row ->> 'pricing_version' AND ((v_row ->> 'input_rate_per_1k')::numeric(18, 8) IS NULL OR (s.input_rate_per_1k, s.output_rate_per_1k) = ((v_row ->> 'input_rate_per_1k')::numeric(18, 8), (v_row ->> 'output_rate_per_1k')::numeric(18, 8))) THEN s.id END FROM (SELECT) AS one LEFT JOIN pricing_snapshots AS s ON s.tenant_id = p_tenant AND s.model = v_row ->> 'priced_model' AND s.snapshot_date = (v_row ->> 'snapshot_date')::date WHERE s.id IS NOT NULL OR v_row ->> 'priced_model' IS NULL ON CONFLICT DO NOTHING;
        IF FOUND THEN
            v_rest := v_rest - 'llm_calls';
        END IF;
    END IF;
    IF jsonb_array_length(p_ledger -> 'connector_calls') = 1 THEN
        v_row := p_ledger #> '{connector_calls,0}';
        INSERT INTO connector_calls (id, tenant_id, span_id, connector_id, capability, envelope, run_id, cost_eur, cost_status, pricing_version, idempotency_key, pricing_snapshot_id) SELECT (v_time || overlay(left(encode(sha256(convert_to(v_row ->> 'idempotency_key', 'UTF8')), 'hex'), 18) PLACING '8' FROM 4 FOR 0))::uuid, p_tenant, v_row ->> 'span_id', v_row ->> 'connector_id', v_row ->> 'capability', v_row -> 'envelope', (v_row ->> 'run_id')::uuid, (v_row ->> 'cost_eur')::numeric, (v_row ->> 'cost_status')::cost_status, v_row ->> 'pricing_version', v_row ->> 'idempotency_key', CASE WHEN s.pricing_version = v_row ->> 'pricing_version' AND ((v_row ->> 'input_rate_per_1k')::numeric(18, 8) IS NULL OR (s.input_rate_per_1k, s.output_rate_per_1k) = ((v_row ->> 'input_rate_per_1k')::numeric(18, 8), (v_row ->> 'output_rate_per_1k')::numeric(18, 8))) THEN s.id END FROM (SELECT) AS one LEFT JOIN pricing_snapshots AS s ON s.tenant_id = p_tenant AND s.model = v_row ->> 'priced_model' AND s.snapshot_date = (v_row ->> 'snapshot_date')::date WHERE s.id IS NOT NULL OR v_row ->> 'priced_model' IS NULL ON CONFLICT DO NOTHING;
        IF FOUND THEN
            v_rest := v_rest - 'connector_calls';
        END IF;
    END IF;
    IF v_rest <> '{}' THEN
        PERFORM engine_write_ledger_v2(p_tenant, v_rest::json);
    END IF;
END
$$;
