-- As before, but that what is as by default may be said or not: earlier releases stored a definition in full.
CREATE OR REPLACE FUNCTION engine_calls_alike_v1(p_one jsonb, p_other jsonb) RETURNS boolean
LANGUAGE plpgsql IMMUTABLE SECURITY INVOKER SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    v_who_may constant text[] := ARRAY['status', 'description', 'required_scopes'];
    v_unsaid  constant jsonb := '{"version": "1", "certified": false, "idempotent": false, "stateless": false, "network": false,
        "approval": false, "security_relevant": [], "model_argument": "", "timeout_seconds": 300}';
    v_cost    constant jsonb := '{"max_eur": "0", "eur_per_unit": {}, "max_usage": {}}';
BEGIN
    IF COALESCE(jsonb_typeof(p_one) <> 'object' OR jsonb_typeof(p_other) <> 'object', true) THEN
        RETURN false;
    END IF;
    RETURN (v_unsaid || p_one || jsonb_build_object('cost', v_cost || COALESCE(p_one -> 'cost', '{}'))) - v_who_may
         = (v_unsaid || p_other || jsonb_build_object('cost', v_cost || COALESCE(p_other -> 'cost', '{}'))) - v_who_may;
END
$$;
